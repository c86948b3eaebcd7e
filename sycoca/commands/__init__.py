"""What `python -m sycoca` can do; torch is loaded only once the arguments are known to be right."""
