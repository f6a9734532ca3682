"""`quantkit bench`: how fast a model is served, in engines that take turns, or by a server."""
