// A timeline over the moments that the page holds; every part shows its film at the moment of the timeline.
const { moments, films } = JSON.parse(document.getElementById("data").textContent);
const [timeline, label, play, speed] = ["timeline", "label", "play", "speed"].map(id => document.getElementById(id));
const parts = [...document.querySelectorAll("section[data-part]")], last = moments.length - 1;
const choices = parts.map(part => part.querySelector("select")).filter(Boolean);
const theme = () => matchMedia("(prefers-color-scheme: dark)");
const moment = () => Number(timeline.value);
const filmOf = part => films[part.dataset.part][part.querySelector("select")?.value ?? ""];

function figureAt(film, at) {  // the first figure, with what changed since
  const figure = structuredClone(film.figure);
  for (const [path, value] of film.frames[film.at[at]].changes)
    path.slice(0, -1).reduce((place, key) => place[key], figure)[path.at(-1)] = value;
  return figure;
}
const BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
// What a part should have drawn: choice, frame and theme.
const wanted = part => [part.querySelector("select")?.value, filmOf(part).at[moment()], theme().matches].join();

let drawing = false;
async function draw() {  // the figures, the one that has waited longest first, until all are at the moment of the timeline
  if (drawing) return;
  drawing = true;
  const waiting = parts.filter(part => part.querySelector(".plotly-graph-div"));
  for (let part; (part = waiting.find(each => each.dataset.drawn !== wanted(each))); waiting.push(...waiting.splice(waiting.indexOf(part), 1))) {
    const box = part.querySelector(".plotly-graph-div"), { data, layout } = figureAt(filmOf(part), moment());
    const first = !part.dataset.drawn, now = wanted(part);
    layout.font = { ...layout.font, color: getComputedStyle(document.body).color };
    layout.modebar = { orientation: "v" }; layout.margin = { ...layout.margin, r: Math.max(40, layout.margin?.r ?? 0) };  // buttons stand beside the figure, not on its legend
    await Plotly.react(box, data, { ...layout, autosize: true }, { responsive: true, displaylogo: false, modeBarButtons: BUTTONS });
    if (first && "timed" in part.dataset) box.on("plotly_click", event => reach(event.points[0].x));
    part.dataset.drawn = now;
    await new Promise(resolve => setTimeout(resolve));  // keys and pictures come first
  }
  drawing = false;
}
function show() {
  label.textContent = `step ${moments[moment()].toLocaleString("en")} of ${moments[last].toLocaleString("en")}`;
  for (const part of parts) {
    const film = filmOf(part), { note, picture } = film.frames[film.at[moment()]], image = part.querySelector("img");
    part.querySelector(".note").textContent = note;
    if (image) [image.src, image.dataset.layer] = [picture, part.querySelector("select").value];
  }
  draw();
}
const go = at => { timeline.value = Math.min(Math.max(at, 0), last); show(); };
const reach = step => go(moments.findLastIndex(each => each < step + 0.5));

function choose(select) {  // a layer in one part is its layer, and the ReLU behind it, in every other
  const { weight } = select.selectedOptions[0].dataset;
  for (const other of choices) if (other !== select && other.selectedOptions[0].dataset.weight !== weight) {
    const found = [...other.options].find(option => option.value === select.value) ||
                  [...other.options].find(option => weight && option.dataset.weight === weight);
    if (found) other.value = found.value;
  }
  show();
}
let timer = 0, pace = 400;  // milliseconds a moment
function run(on) {
  clearInterval(timer); timer = on ? setInterval(() => moment() < last ? go(moment() + 1) : run(false), pace) : 0;
  play.textContent = on ? "❚❚" : "▶";
}
play.onclick = () => {
  if (!timer && moment() === last) go(0);
  run(!timer);
};
speed.onclick = () => {
  pace = pace === 50 ? 400 : pace / 2;
  speed.textContent = `${400 / pace} x`;
  if (timer) run(true);
};
document.addEventListener("keydown", event => {
  const to = { ArrowLeft: moment() - 1, ArrowRight: moment() + 1, Home: 0, End: last }[event.key];
  if (event.target.matches("select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (to !== undefined) go(to);
  else if (event.key === " " && !event.target.matches("button")) play.onclick();
  else return;
  event.preventDefault();
});
for (const select of choices) select.onchange = () => choose(select);
timeline.addEventListener("input", show);
theme().addEventListener("change", show);  // of a list that nobody reads: one that was read early tells no change
if (choices.length) choose(choices[0]); else show();
