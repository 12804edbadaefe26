# SPDX-License-Identifier: Apache-2.0
"""Passes over the graphs of one engine; each is a function that edits a graph in place.

A pass is called once for a forward graph and once for its backward graph as
`pass_fn(gm, graph_id, graph_order, profiling_results, create_inputs_fn, mem_budget, param_manager, bwd)`.
"""
