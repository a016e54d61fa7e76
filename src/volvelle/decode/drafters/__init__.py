"""What proposes tokens for the target to check: one file a drafter."""
