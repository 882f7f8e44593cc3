"""The four-condition evaluation: what is asked, who answers, how it is counted."""
