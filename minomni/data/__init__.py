"""The generated world that models are trained on, and training data of one's own."""
