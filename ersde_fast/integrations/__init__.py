"""The step inside the tools people sample with; each module imports its tool only when it is imported itself."""
