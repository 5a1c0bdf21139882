"""What is kept: the database, logs, small files, and the directory that holds them."""
