"""Other people's weights: reading them (``load``), writing them (``export``), and their layouts (``families``)."""
