"""One thin parser per command: flags in, one function called, its result printed. Knows every room."""
