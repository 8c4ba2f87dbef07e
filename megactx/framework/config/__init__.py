"""Where the configs are, what their settings may be, and the pages that are made of them."""
