"""A web server: a page to talk to the model, and the API of OpenAI's clients."""
