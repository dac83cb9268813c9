"""ComfyUI's page in a browser."""


def opened(page, server):
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("!!window.LiteGraph?.registered_node_types.DistillTrainStep", timeout=60_000)
    page.wait_for_function("!!window.app?.extensionManager?.workflow?.activeWorkflow?.isLoaded", timeout=60_000)


def load(page, graph):
    page.evaluate("graph => app.loadGraphData(graph)", graph)
