"""Images, text and pages for people to look at."""
