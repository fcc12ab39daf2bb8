// The command line: join a mesh by a token, say who comes and goes, chat, and use each other's services.
import { createInterface } from 'node:readline'
import { parseArgs } from 'node:util'
import { joinMesh } from './peer.js'
import { echo, port } from './services.js'
import { SCOPE } from './wire.js'

const USAGE = 'usage: node main.js TOKEN [--listen MULTIADDR] [--expose NAME=HOST:PORT] [--expose-to-workers NAME=HOST:PORT]'
const ROOM = 'chat' // the topic of examples/chat.py

const short = (peer) => peer.slice(-6)

function show ({ peer, state, services, topic, data }) {
  if (state !== undefined) console.log(`${short(peer)} is ${state}, offering: ${services.join(', ') || 'nothing'}`)
  else if (topic === ROOM) console.log(`${short(peer)}: ${data}`)
}

function offered (toAll, toWorkers) {
  const services = new Map([['echo', { scope: SCOPE.SCOPE_CLIENT, serve: echo }]])
  for (const [scope, exposed] of [[SCOPE.SCOPE_CLIENT, toAll], [SCOPE.SCOPE_WORKER, toWorkers]]) {
    for (const one of exposed) {
      const [, name, host, number] = /^(.+?)=(.+):(\d+)$/.exec(one) ?? []
      if (name === undefined) throw new Error(`${one} is not NAME=HOST:PORT`)
      services.set(name, { scope, serve: port(host, Number(number)) })
    }
  }
  return services
}

/** Send a text to a service of whoever offers it, and show all that comes back. */
async function call (peer, service, text) {
  const row = peer.members.rows.find(({ said, state }) => state === 'alive' && said.services.some(({ name }) => name === service))
  if (row === undefined) throw new Error(`nobody offers ${JSON.stringify(service)}`)
  const reader = await peer.open(row.said.peerKey, service)
  await reader.send(Buffer.from(text))
  await reader.stream.close()
  const answer = []
  for (let data; (data = await reader.some()) !== null;) answer.push(data)
  console.log(`${service} answered: ${Buffer.concat(answer)}`)
}

async function obey (peer, line) {
  const [, command, service, text] = /^\/(\w+)\s*(\S*)\s*(.*)$/.exec(line) ?? []
  if (command === undefined) peer.post(ROOM, Buffer.from(line))
  else if (command === 'call') await call(peer, service, text)
  else console.log('say something, or /call SERVICE TEXT')
}

async function main () {
  const list = { type: 'string', multiple: true, default: [] }
  const options = { listen: { type: 'string' }, expose: list, 'expose-to-workers': list }
  const { values, positionals: [token, ...more] } = parseArgs({ options, allowPositionals: true })
  if (token === undefined || more.length > 0) throw new Error(USAGE)
  const listen = values.listen === undefined ? undefined : [values.listen]
  const peer = await joinMesh(token, { listen, services: offered(values.expose, values['expose-to-workers']), tell: show })
  for (const address of peer.addresses) console.log(`you are ${short(peer.id)} at ${address}/p2p/${peer.id}`)
  const lines = createInterface({ input: process.stdin })
  process.once('SIGINT', () => lines.close())
  for await (const line of lines) {
    await obey(peer, line).catch((error) => console.log(`that did not work: ${error.message}`))
  }
  await peer.stop()
}

main().then(() => process.exit(0), (error) => {
  console.error(error.message)
  process.exit(1)
})
