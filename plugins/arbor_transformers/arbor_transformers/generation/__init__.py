"""From prompts to tokens to text, many sequences at a time."""
