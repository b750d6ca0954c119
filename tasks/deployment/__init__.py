"""The folder serve/ of a bundle: how to run the model on servers, from its size and the described hardware."""
