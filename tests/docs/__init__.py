"""The docs: their examples run, and the site that is built of them works."""
