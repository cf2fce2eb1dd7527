"""train: self-distillation on people's own images, through Ray Train."""
