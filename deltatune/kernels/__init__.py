"""Fast forms of the operations, one folder each: `naive` first, which is plain PyTorch and the reference."""
