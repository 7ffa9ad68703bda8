"""Commands built on the engine and the models; each file is a function first and a command second."""
