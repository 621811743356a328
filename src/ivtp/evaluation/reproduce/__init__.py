"""The paper's tables and figures as commands: one file each, with `make(request, report)`."""
