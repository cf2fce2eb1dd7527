"""train: self-distillation on one's own images, through Ray Train."""
