"""Units of channels that can be dropped: which there are, what they matter, and how they go."""
