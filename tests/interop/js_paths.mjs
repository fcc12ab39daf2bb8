// A js-libp2p peer that relays, is relayed and punches holes, for test_js_paths.py and the lab. Talks in lines of JSON.
// Run from a folder whose node_modules has what package.json names. Argument: JSON {relay, listen, at}: whether to be a
// relay; addresses to listen at (circuits included); addresses to announce.
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

const load = (name) => import(pathToFileURL(`${process.cwd()}/node_modules/${name}/dist/src/index.js`).href)
const { createLibp2p } = await load('libp2p')
const { circuitRelayServer, circuitRelayTransport } = await load('@libp2p/circuit-relay-v2')
const { dcutr } = await load('@libp2p/dcutr')
const { identify, identifyPush } = await load('@libp2p/identify')
const { noise } = await load('@libp2p/noise')
const { ping } = await load('@libp2p/ping')
const { tcp } = await load('@libp2p/tcp')
const { yamux } = await load('@libp2p/yamux')
const { multiaddr } = await load('@multiformats/multiaddr')

const say = (value) => console.log(JSON.stringify(value))
const wish = JSON.parse(process.argv[2])
const node = await createLibp2p({
  addresses: { listen: wish.listen, appendAnnounce: wish.at ?? [] },
  transports: [tcp(), circuitRelayTransport()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionGater: { denyDialMultiaddr: () => false },
  services: {
    identify: identify(),
    identifyPush: identifyPush(),
    ping: ping(),
    ...(wish.relay ? { relay: circuitRelayServer({ reservations: { applyDefaultLimit: false } }) } : { dcutr: dcutr() })
  }
})

await node.handle('/echo/1.0.0', async (stream) => {
  for await (const chunk of stream) {
    if (!stream.send(chunk)) await stream.onDrain()
  }
  await stream.close()
}, { runOnLimitedConnection: true })
say({ id: node.peerId.toString(), addresses: node.getMultiaddrs().map(String) })

async function readAll (stream) {
  const chunks = []
  for await (const chunk of stream) chunks.push(Buffer.from(chunk.subarray()))
  return Buffer.concat(chunks)
}

const actions = {
  async addresses () {
    return { addresses: node.getMultiaddrs().map(String) }
  },
  async echo ({ address, size }) {
    const stream = await node.dialProtocol(multiaddr(address), '/echo/1.0.0', { runOnLimitedConnection: true })
    const data = Buffer.alloc(size)
    for (let i = 0; i < size; i++) data[i] = (i * 31 + (i >> 8)) & 255
    const reading = readAll(stream)
    for (let start = 0; start < size; start += 65536) {
      if (!stream.send(data.subarray(start, start + 65536))) await stream.onDrain()
    }
    await stream.close()
    return { same: data.equals(await reading) }
  },
  async paths ({ peer }) {
    const connections = node.getConnections().filter((each) => each.remotePeer.toString() === peer)
    return { paths: connections.map((each) => each.remoteAddr.toString()) }
  }
}
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  try {
    say({ done: command.do, ...await actions[command.do](command) })
  } catch (error) {
    say({ done: command.do, failed: String(error) })
  }
}
process.exit(0)
