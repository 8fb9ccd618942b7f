// Brings an explorer into sight when its cell has been run, until somebody scrolls, clicks or types. `Stage` in explorer.py is its other half.
const shelf = (globalThis.sparselab ??= {});

export default () => {
  let shown = false;
  return {
    render({ el }) {
      setTimeout(() => {  // marked once: a selector with :has would be asked again at every change of the page
        const holds = ".jp-Cell-outputWrapper, .jp-OutputArea, .jp-OutputArea-child, .jp-OutputArea-output";
        for (let box = el; box; box = box.parentElement) if (box.matches(holds)) box.classList.add("sparselab-holds");
      }, 50);
      if (shown) return;
      shown = shelf.arrived = {};  // of several, the last
      const mine = shown, events = ["wheel", "pointerdown", "keydown"], leave = () => { if (shelf.arrived === mine) shelf.arrived = null; };
      const bring = () => {
        const page = el.closest(".jp-WindowedPanel-outer, .jp-Notebook"), all = el.closest(".sparselab-explorer");
        if (shelf.arrived === mine && page && all) page.scrollTop += all.getBoundingClientRect().top - page.getBoundingClientRect().top;
      };
      const timers = [100, 300, 1000, 2000, 3000, 4000].map(wait => setTimeout(bring, wait));
      timers.push(setTimeout(leave, 4100));
      for (const event of events) window.addEventListener(event, leave, { capture: true, once: true });
      return () => {
        timers.forEach(clearTimeout);
        for (const event of events) window.removeEventListener(event, leave, { capture: true });
      };
    },
  };
};
