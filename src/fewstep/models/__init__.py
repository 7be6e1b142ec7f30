"""Networks behind one question: what do you predict at (x_t, t)?"""
