// anywidget waits two seconds for the script of a model and then drops, for good, all that a kernel sends to the model. A busy machine takes longer.
// `listen` takes the messages from the comm itself, and asks the kernel once for what was dropped before.
function itself(model) {  // the model behind anywidget's handle: an event of a change carries it
  let found = null;
  const take = own => { found = own; }, asks = model.get("asks");
  model.on("change:asks", take); model.set("asks", asks + 1); model.set("asks", asks); model.off("change:asks", take);
  return found;
}
function listen(model) {
  const own = itself(model), handle = own && Object.getPrototypeOf(Object.getPrototypeOf(own))._handle_comm_msg;
  if (!own?.comm?.on_msg || !handle) return;  // a host with messages of its own
  own.comm.on_msg(message => handle.call(own, message));
  own._handle_comm_msg({ content: { data: { method: "" } } }).catch(() => {  // refused, as all that came before
    model.set("asks", model.get("asks") + 1); model.save_changes();
  });
}

