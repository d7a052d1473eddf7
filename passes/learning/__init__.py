"""What is learned by gradient: its losses, its loops, and what stands for codes and masks meanwhile."""
