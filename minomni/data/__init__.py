"""The generated world that models are trained on, and user-supplied training data."""
