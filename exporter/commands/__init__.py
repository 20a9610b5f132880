"""The subcommands of `gptoss-export`, one file each family."""
