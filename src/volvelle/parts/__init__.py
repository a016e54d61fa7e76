"""Pure tensor code, torch only: no files, no configuration objects, no logging. One technique, one file."""
