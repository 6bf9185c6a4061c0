"""Plumbing, written once: sites, declared tensors, attaching, composing, files. It names no method."""
