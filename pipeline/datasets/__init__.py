"""Raw data -> shards: the sources, and the one function that writes a prepared data set."""
