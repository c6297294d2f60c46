"""Distillation: answers written by the target itself, here or by a server, to train heads on."""
