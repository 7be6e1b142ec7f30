"""Drawing with what there is: runs, exports, published files and teachers, from Python, a shell or a page."""
