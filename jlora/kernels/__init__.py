"""C++ operators, compiled into one library at first use; the plain modules define what is right."""
