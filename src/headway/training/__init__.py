"""Training: objectives, optimizers, schedules and the one loop that every kind of model goes through."""
