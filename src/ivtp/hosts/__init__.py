"""Model families, one file each; `ivtp.list_hosts()` finds them by their files."""
