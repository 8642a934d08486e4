"""A run as a page: what happened, where and since when, to be looked at in a browser, TensorBoard or a notebook."""
