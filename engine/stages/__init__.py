"""The stages of DeepSeek-R1, one file each; every module has run(config) -> None."""
