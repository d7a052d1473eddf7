"""What a compile has computed is kept, and found again."""
