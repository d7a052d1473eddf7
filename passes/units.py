"""What losses and measures are called in reports: those who write a table and those who read it agree by these."""

NATS = "nats a token"
KL = "KL from original"  # nats a token, on a text
