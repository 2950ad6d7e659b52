"""Knowledge distillation for Lightning."""
