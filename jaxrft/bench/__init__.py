"""Measurements that a user can repeat: each module is a command, `jaxrft bench NAME`, its `main(arguments)`."""
