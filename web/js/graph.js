// Of the nodes of a graph: what follows a method of theirs, and where values come from, also through the borders of subgraphs.

import { app } from "../../../scripts/app.js";

const SUBGRAPH_INPUTS = -10; // the id of what stands for a subgraph's inputs in it

/** The input that takes the place of a widget; undefined if the widget itself has the value. */
export function inputInPlaceOf(node, name) {
  return node.inputs?.find((input) => input.widget?.name === name && input.link != null);
}

/** The node that a graph is the subgraph of, and which of that one's inputs gives an input its value; null if there is none, or
 * if several nodes share the subgraph. */
export function outside(node, input) {
  const { graph } = node;
  const link = graph?.getLink?.(input.link);
  if (Number(link?.origin_id) !== SUBGRAPH_INPUTS) return null;
  const [host, ...others] = hostsOf(graph);
  if (!host || others.length) return null;
  return { host, name: graph.inputs[link.origin_slot].name, slot: link.origin_slot };
}

/** The nodes that a graph is the subgraph of. */
function hostsOf(graph) {
  const graphs = [graph.rootGraph, ...(graph.rootGraph.subgraphs?.values() ?? [])];
  return graphs.flatMap(({ nodes }) => nodes).filter(({ subgraph }) => subgraph === graph);
}

/** What the server calls a node: "5", or "7:5" in the subgraph of node 7; several if several nodes share the subgraph. */
export function executionIds({ id, graph }) {
  if (!graph?.rootGraph || graph === graph.rootGraph) return [String(id)];
  return hostsOf(graph).flatMap(executionIds).map((host) => `${host}:${id}`);
}

/** Whether a node is in a graph that is not open any more. Of a graph that closes, nodes in subgraphs are not told by onRemoved. */
export function isLeftBehind({ graph }) {
  const root = app.rootGraph ?? app.graph;
  return Boolean(graph) && ![root, ...(root?.subgraphs?.values() ?? [])].includes(graph);
}

/** Call `then` after a method of an object, if it has one. */
export function after(object, method, then) {
  const before = object[method];
  object[method] = function (...values) {
    const result = before?.apply(this, values);
    then();
    return result;
  };
}
