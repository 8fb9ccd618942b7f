// A plotly figure that follows a timeline; plotly.js is asked for once a page. `Plot` in plot.py is its other half.
const shelf = (globalThis.sparselab ??= {});  // shared by all figures of the page

async function plotly(model) {
  while (!shelf.Plotly) {
    if (!(performance.now() - shelf.asked < 15000)) {  // nobody has asked, or a kernel that is gone
      shelf.asked = performance.now();
      model.set("wants", model.get("wants") + 1); model.save_changes();
    }
    await new Promise(resolve => setTimeout(resolve, 50));
  }
  return shelf.Plotly;
}
async function receive(message, buffers) {
  if (message.kind === "plotly.js" && !shelf.Plotly) {
    const url = URL.createObjectURL(new Blob([buffers[0]], { type: "text/javascript" }));
    await import(url);
    shelf.Plotly = globalThis.Plotly;
    URL.revokeObjectURL(url);
  }
  if (message.kind === "copy") {
    try { await navigator.clipboard.writeText(message.text); } catch {  // not allowed, or a page without https
      const box = Object.assign(document.createElement("textarea"), { value: message.text });
      document.body.append(box); box.select(); document.execCommand("copy"); box.remove();
    }
  }
  if (message.kind === "save") {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([buffers[0]], { type: message.type }));
    link.download = message.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
}

export default () => {
  const near = new Set();  // the views that are in sight
  return {
    initialize({ model }) { model.on("msg:custom", receive); listen(model); },
    render({ model, el }) {
      const box = document.createElement("div");
      box.className = "sparselab-plot"; box.dataset.drawn = 0;
      box.textContent = "The figure appears when a kernel is connected.";
      el.append(box);
      let Plotly = null, down = null, gone = false, width = 0, soon = 0;
      const marked = (shapes = []) => {  // the figure's own markers, moved, or one through all of it; without `at` as they are
        const x = model.get("at"), rest = shapes.filter(shape => shape.name !== "now");
        const own = shapes.filter(shape => shape.name === "now");
        if (x === null) return shapes;
        const line = { type: "line", y0: 0, y1: 1, yref: "paper", name: "now", line: { color: getComputedStyle(box).color, dash: "dot" } };
        return [...rest, ...(own.length ? own : [line]).map(shape => ({ ...shape, x0: x, x1: x }))];
      };
      async function draw() {
        Plotly = await plotly(model);
        if (gone || !model.get("figure")) return;
        if (!box.dataset.ready) { box.textContent = ""; box.dataset.ready = "yes"; }
        const figure = JSON.parse(model.get("figure"));
        const layout = { ...figure.layout, autosize: true, width: undefined, shapes: marked(figure.layout.shapes) };
        await Plotly.react(box, figure.data, layout, { responsive: false, displaylogo: false, displayModeBar: false });
        if (box.dataset.drawn === "0") box.on("plotly_hover", event => {
          const data = event.points[0].customdata ?? null;
          if (data !== null) { model.set("hovered", data); model.save_changes(); }
        });
        box.dataset.drawn = Number(box.dataset.drawn) + 1;
      }
      const move = () => { if (box._fullLayout) Plotly.relayout(box, { shapes: marked(box.layout.shapes) }); };
      const mark = () => { clearTimeout(soon); soon = setTimeout(move, 80); };  // masks are drawn first
      const point = event => {
        const found = box._hoverdata?.[0], frame = box.getBoundingClientRect();
        const inside = (axis, at) => at >= axis._offset && at <= axis._offset + axis._length;
        const parts = Object.values(box._fullLayout._plots || {});  // the part of the figure under the mouse, or the first
        const { xaxis: x, yaxis: y } = parts.find(part => inside(part.xaxis, event.clientX - frame.left) &&
                                                          inside(part.yaxis, event.clientY - frame.top)) || box._fullLayout;
        return { x: x.p2d(event.clientX - frame.left - x._offset), y: y.p2d(event.clientY - frame.top - y._offset),
                 data: found?.customdata ?? null, n: (model.get("clicked").n || 0) + 1 };
      };
      const pressed = event => { down = [event.clientX, event.clientY]; };
      const released = event => {
        if (!down || !box._fullLayout || Math.hypot(event.clientX - down[0], event.clientY - down[1]) > 4) return;
        down = null;
        model.set("clicked", point(event)); model.save_changes();
      };
      const save = message => {
        if (message.kind === "png") plotly(model).then(Plotly => Plotly.downloadImage(
          JSON.parse(message.figure), { format: "png", scale: 2, filename: message.name, width: 900, height: message.height }));
      };
      box.addEventListener("pointerdown", pressed, true);
      window.addEventListener("pointerup", released, true);
      model.on("change:figure", draw); model.on("change:at", mark); model.on("msg:custom", save);
      const resized = new ResizeObserver(() => {
        if (box._fullLayout && box.clientWidth && box.clientWidth !== width) { width = box.clientWidth; Plotly.Plots.resize(box); }
      });
      resized.observe(box);
      const sight = new IntersectionObserver(seen => {
        near[seen.at(-1).isIntersecting ? "add" : "delete"](box);
        if (model.get("hidden") === near.size > 0) { model.set("hidden", !near.size); model.save_changes(); }
      });
      sight.observe(box);
      draw();
      return () => {
        gone = true; clearTimeout(soon); resized.disconnect(); sight.disconnect(); near.delete(box);
        window.removeEventListener("pointerup", released, true);
        model.off("change:figure", draw); model.off("change:at", mark); model.off("msg:custom", save);
        if (Plotly) Plotly.purge(box);
      };
    },
  };
};
