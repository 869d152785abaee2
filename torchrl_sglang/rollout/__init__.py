"""TensorDict in, TensorDict out: prompts are read, generated or scored by the servers, and written back."""
