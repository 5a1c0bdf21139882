"""Learning from rollouts on the server's side: credits, sessions, the completion ledger."""
