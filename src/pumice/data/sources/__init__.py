"""Every format that rows come in: each file reads one family and gives its rows as mappings of columns."""
