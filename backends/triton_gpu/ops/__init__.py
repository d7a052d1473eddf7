"""The operators that a graph lowered for GPUs is made of, with eager bodies that define what they mean.

Each is a `torch.library` operator in the namespace `fxpress`: the eager body runs on CPUs and is what tests compare with; the kernel for
"cuda" is imported when it is first launched. Importing a module registers its operators.
"""
