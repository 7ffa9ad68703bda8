"""Commands over the package, one file each: a function first, a flag parser second."""
