"""Choices under one budget: what each costs, which is best, and what measuring it says."""
