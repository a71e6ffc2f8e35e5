"""The commands of `robustok`: each is one function, with its settings as a Config."""
