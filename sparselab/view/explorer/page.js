// A slider over moments: the picture of every mask, and the marker of every panel that has one.
const { moments, masks } = JSON.parse(document.getElementById("frames").textContent);
const timeline = document.getElementById("timeline"), label = document.getElementById("label");
const show = () => {
  const at = Number(timeline.value);
  label.textContent = `step ${moments[at].toLocaleString("en")} of ${moments.at(-1).toLocaleString("en")}`;
  for (const image of document.querySelectorAll("img[data-layer]")) {
    let from = at;
    while (!masks[image.dataset.layer][from][0]) from--;  // a mask that stays is held once
    [image.src, image.nextElementSibling.textContent] = masks[image.dataset.layer][from];
  }
  for (const plot of document.querySelectorAll(".plotly-graph-div")) {
    const shapes = plot.layout?.shapes || [], epochs = plot.layout?.xaxis?.title?.text === "epoch";
    if (shapes.some(shape => shape.name === "now") && !epochs) Plotly.relayout(plot, {
      shapes: shapes.map(shape => shape.name === "now" ? { ...shape, x0: moments[at], x1: moments[at] } : shape) });
  }
};
timeline.addEventListener("input", show);
window.addEventListener("load", show);
